"""A model as a folder: what is handed to a colleague."""
