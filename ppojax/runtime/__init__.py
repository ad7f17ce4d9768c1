"""What surrounds the computation of a run: its directory, checkpoints, metrics, transcripts, display, and signals."""
