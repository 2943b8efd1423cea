"""Safe rows of our own writing, for those who have none: rows.jsonl, by notion, style and language."""
