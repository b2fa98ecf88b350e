"""The Continuous Thought Machine on mazes: find the route from the image alone."""
