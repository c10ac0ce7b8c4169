"""A model at work: session, engine, tokenizer, template, chat, bench."""
