"""The command line: main.py has the app, and each group of commands has a file."""
