"""Two questions about a verdict: where do the frozen teachers look, and which support images did it rest on?"""
