"""Settings, arguments and files of other projects."""
