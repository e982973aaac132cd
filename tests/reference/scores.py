"""Read the tables of scores that `predict` writes, without anatomaly."""

import csv

NUMBERS = {"frame": int, "label": int, "score": float, "p_value": float, "seconds": float}


def read_scores(path):
    """One dict per row; numbers as such, None where a cell is empty."""

    def value(column, text):
        kind = float if column.startswith("weight_") else NUMBERS.get(column, str)
        return None if text == "" else kind(text)

    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    return [{column: value(column, text) for column, text in zip(header, line, strict=True)} for line in lines]
