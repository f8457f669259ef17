"""The command line: entry.py starts it, main.py has the app, and each group of commands has a file."""
