"""Structured pruning: channels, filters, neurons and heads are taken out of a model, which is verified afterwards."""
