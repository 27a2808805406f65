"""Access to a machine: live, over SSH, through a guest agent, or recorded in a folder.

Every read of a machine passes through `protocol.Host`.  What can't be read is a value that says
why, so that "it is not there", "I may not look" and "looking failed" stay different facts.
"""
