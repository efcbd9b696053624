"""Makes the page of demo.sh: what it offers, the videos of a request, a queue, and the page itself."""
