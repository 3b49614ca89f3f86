"""Streams for people: a model opened, a video fed to it, a transcript on the terminal."""
