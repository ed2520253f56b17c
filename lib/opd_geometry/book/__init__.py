"""What a reader sees: figures, chapters, the site, a report about a pair."""
