"""The encoders of all libraries as tasks see them: images, speech, images and text."""
