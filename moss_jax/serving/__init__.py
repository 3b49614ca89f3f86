"""The live server: many streams of one engine under OpenAI's Realtime protocol, with a page that watches."""
