"""The next token of each sequence."""
