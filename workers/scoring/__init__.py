"""Scores of saved models: loss, perplexity, IFEval, lm-eval, answers."""
