"""Instructions that a model has and the silicon lacks, emulated at their #UD."""
