"""The cells that ran: their names, what they did to the session, and what became of them since."""
