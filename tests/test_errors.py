"""What is said of exceptions that others raise."""

from disam_theory.errors import first_line


def test_the_first_line_of_an_exception_or_its_type():
    assert first_line(RuntimeError("shapes differ\nat line 3")) == "shapes differ"
    assert first_line(AssertionError()) == "AssertionError"  # a bare assert
