"""`AdapterModel` and the state that its verbs share."""
