"""Jobs: recipes that wait in a database and run one subprocess each, safe to kill at any moment."""
