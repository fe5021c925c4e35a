"""The door for programs that speak OpenAI's HTTP: models, chat completions, completions."""
