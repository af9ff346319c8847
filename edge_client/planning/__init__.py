"""What a plan will cost on given devices over a given link, before it is used. Nothing private is read."""
