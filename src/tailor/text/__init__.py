"""Words: messages, tokenizers, chat templates, rendering to token ids and back, text similarity."""
