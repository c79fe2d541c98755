//go:build !cgo

package main

func greet() {}
