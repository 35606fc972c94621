"""What each kind of op needs to be computed part by part."""
