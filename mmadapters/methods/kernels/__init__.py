"""The fast paths of methods: a GPU kernel, and linear maps without a module's call."""
