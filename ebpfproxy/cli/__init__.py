"""The command line. Nouns read, verbs change; each command imports what it needs, when it runs."""
