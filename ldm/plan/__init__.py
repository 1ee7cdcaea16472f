"""What a run will cost, before it starts: operations, memory, time."""
