"""Pure functions from texts and numbers to scores: exact match, F1, ROUGE, BLEU, intervals, answer extraction."""
