"""What tests of the service send, and how they read an error."""


def files(field, pictures):
    """Pictures as a form's files."""
    return [(field, picture) for picture in pictures]


def error_of(answer, status):
    """The one line of an answer of this status."""
    assert answer.status_code == status, answer.text
    line = answer.json()["error"]
    assert line and "\n" not in line
    return line
