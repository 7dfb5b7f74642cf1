// The tools of an MCP server beside the others of a conversation.
#pragma once
#include <memory>
#include <string>

#include "agents/mcp/client.h"
#include "agents/tools/toolbox.h"

namespace perigee::agents {

// For make_toolbox: {{"mcp", add_mcp_tools}}. An entry is
//   {"tool": "mcp", "command": ["npx", "server", ...], "env": {...}, "cwd": "..."}     a child, of the box's life
//   {"tool": "mcp", "url": "http://127.0.0.1:3001/mcp", "headers": {...}, "remote": false}
// and in both "prefix" (before each tool's name), "only" (a list of the server's names), "connect_s", "call_s".
// docs/mcp.md has all of it. Connects at once.
// ERRORS (input): the entry. ERRORS (environment): the server.
void add_mcp_tools(const nlohmann::json& entry, const std::string& where, ToolBox& box);

// What a call of the model gets for a reply.
ToolResult mcp_tool_result(const McpReply& reply, int64_t output_bytes);

// The name under which a server's tool is declared: what a name may not hold becomes '_', 64 characters at most.
std::string mcp_tool_name(const std::string& prefix, const std::string& name);

}  // namespace perigee::agents
