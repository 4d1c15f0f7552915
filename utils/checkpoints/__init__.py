"""What a run saves to go on from, as files that no reader executes."""
