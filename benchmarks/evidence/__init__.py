"""Does asynchrony, screening or another group shape learn more from a token? See __main__.py."""
