"""A page of HTML -> its tags with their attributes, and its text; for the tests of what is written as pages."""

from html.parser import HTMLParser


class Elements(HTMLParser):
    """``seen``: each start tag with its attributes, in order; ``text``: all that lies between tags."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Of HTMLParser."""
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data):
        """Of HTMLParser."""
        self.text += data
