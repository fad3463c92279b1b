"""L4: measuring model folders: perplexity, speed, memory. How the numbers are shown is report's."""
