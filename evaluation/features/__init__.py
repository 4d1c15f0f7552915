"""Features of a data set, extracted once and kept: in memory, in a cache, as one array on disk."""
