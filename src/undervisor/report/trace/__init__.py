"""What an L0 did: transitions as text, as JSON and on a timeline; and a summary of a run."""
