"""A customization on disk: `tailor.json` beside the ecosystem's own files; merging, exporting, finding."""
