"""A module that reaches containers only because the app adds it."""


def greet(name: str) -> str:
    return f"hello {name}"
