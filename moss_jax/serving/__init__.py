"""Live server: many streams of one engine over OpenAI's Realtime protocol, and a web page as client."""
