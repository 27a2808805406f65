"""The machine under the operator: access to it, facts about it, checks of it, fixes for it."""
