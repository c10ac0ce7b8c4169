"""How good a model is on a text: perplexity, and how far it is from a reference."""
