"""Terminal front end: session feed, transcript and timeline."""
