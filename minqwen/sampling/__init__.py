"""How the next token is chosen, and where a text stops."""
