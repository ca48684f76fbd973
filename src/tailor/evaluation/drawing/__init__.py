"""The report of a comparison, drawn from its dict alone: as a page, as Markdown, and for a terminal."""
