"""Fixes: a plan that can be shown, applied so that a kill does no harm, and undone."""
