"""Scores of candidates: a command, a function, labelled images, labelled texts, language models."""
