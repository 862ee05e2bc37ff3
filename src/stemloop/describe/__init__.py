"""Images, patterns and spectra to structure."""
