"""Figures and tables for notebooks: functions of pandas tables that return matplotlib figures."""
