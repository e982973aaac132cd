"""Archives: a list of images of any length, judged by many processes or machines into one table, with Ray Data."""
