"""Watching a video in a terminal: feed of a session, transcript, timeline."""
